"""From images to a checkpoint, and from that to what is served.

Read `batches` (with `augmentation`), `fit` (with `devices`, `optimizer` and `checkpoints`), `calibration`, `export`
(with `heat_map`).
"""
