"""From images as they come to verdicts, without TensorFlow.

Read `file_kinds`, `faces`, `predictor` and `verdict`, then `packets`, `frames` and `video` (clips), `explained`
(pictures with heat maps), `batch_scoring` (tables), `page` (`deepfake serve`; with
`guard`, which refuses foreign requests, and `wrong_verdict`, its reports), `registered` (versions from the registry)
and `shadow` (a second version judges beside production).
"""
