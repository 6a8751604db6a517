"""The audit of a data set by the record of a run: table, pictures, page, corrections."""
