"""Compare the finished runs of a sweep: tables, intervals, fitted laws, figures, report."""
