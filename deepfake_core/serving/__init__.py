"""From images as they come to verdicts, without TensorFlow.

Read `file_kinds`, `faces`, `predictor` and `verdict`, then `packets`, `frames` and `video` (clips), `explained`
(pictures with heat maps), `image_list` and `batch_scoring` (tables), `load_versions` (from the registry), `comparison`
(of two versions on a folder), `shadow` (a second version beside production), `page` (`deepfake serve`), `wrong_verdict`
(its reports), `request_guard` (what it refuses).
"""
