"""What people read.

`data_report` and `model_report` are pages (`pages`, `plots`), `model_card` and `outcome` are text.
"""
