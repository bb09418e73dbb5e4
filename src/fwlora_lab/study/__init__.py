"""Studies: methods x budgets x tasks x seeds, planned, run and resumed."""
