"""Where the model and the corpus that ship with the package lie."""

from pathlib import Path

MODEL_DIR: Path = Path(__file__).parent / "model"
DATA_DIR: Path = Path(__file__).parent / "data"
