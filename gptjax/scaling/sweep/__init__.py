"""A sweep over budgets and sizes: a table of jobs, run by any number of workers, that ends in a table of losses."""
