"""From the records of finished runs to tables, curves and pictures."""
