"""What an axis of a sweep buys: finished runs become tables, intervals, fitted laws, figures and a report."""
