"""What a version meets in production: observations of its verdicts, and whether they differ from its test split.

Writing observations needs neither TensorFlow nor Prefect. In reading order: `observations`, `observer`, `reference`,
`drift`, `reported`.
"""
