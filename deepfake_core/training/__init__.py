"""From images to a checkpoint, and from that to what is served.

Read `batches` (with `augmentation`), `fit` (with `kinds`, `devices`, `optimizer` and `checkpoints`), `calibration`,
`export` (with `heat_map`). On an accelerator: `accelerator`, `steps` (with `degradation`, `recompression` and
`jax_layers`).
"""
