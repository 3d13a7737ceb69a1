"""Where things are kept, whole or not at all.

Read `files` (write a file whole), `progress`, `locks` (one run per folder), `store` (the data folder, or the URL that
machines share; with `store_errors`), `tars` (images in few files), `shared_folder` (a whole folder published at that
URL), then `objects` (small files in a folder or at a URL) and `ranges` (one at a URL, read by range).
"""
