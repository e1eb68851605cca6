"""The experiments of this repository, one a file; `common` is what they share."""
