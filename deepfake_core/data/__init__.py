"""From Kaggle to split folders.

Read along the data: `kaggle` and `local` (archives on this disk; with `credentials`, `kaggle_errors` and `download`),
`archive` and `members` (what they hold), `confirmed` (reports as a source), `index` (a row per file; with
`jpeg_header`, `labels` and `hashes`), `pictures`, `neighbours`, `hash_tables`, `likeness`, `search_shards`, `links`,
`duplicates` and `groups` (near copies), `splits` and `split_memory`, `publishing` and `dataset` (the split folder),
`shortcuts` (what a model could cheat by), `images` (a split as one array).
"""
