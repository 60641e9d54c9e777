"""``nexus-topk/1``: what a teacher says about packed text, kept on disk; docs/teacher-store.md.

``rows`` holds the arrays, ``quantise`` and ``id_planes`` make them small, ``columns`` lays them
out, ``shard`` is one Parquet file, ``manifest`` describes a store; ``writer`` and ``reader`` do
what their names say. Nothing here knows of training, or of torch.
"""
