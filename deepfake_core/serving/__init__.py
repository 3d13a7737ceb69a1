"""From images as they come to verdicts, without TensorFlow.

Read `file_kinds`, `faces`, `predictor` and `verdict`, then `packets`, `frames` and `video` (clips), `explained`
(pictures with heat maps), `batch_scoring` (tables), `page` (`deepfake serve`),
`wrong_verdict` (its reports).
"""
