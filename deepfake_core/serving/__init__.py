"""From images as they come to verdicts, without TensorFlow.

Read `faces`, `predictor` and `verdict`, then `frames` and `video` (clips), `explained` (pictures with heat maps),
`batch_scoring` (tables), `page` (`deepfake serve`).
"""
