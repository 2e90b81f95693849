"""Parameter and FLOP counts, the scaling laws built on them, and fits of those laws to runs.

The way of the data, from runs to a prediction:

    rows.py -> table.py       any CSV, JSONL, sweep or run folders -> a Table of N, D, C and loss, or one clear error
    laws.py                   the formulas of the papers, NumPy in and out; recipes.py: batch and learning rate
    families.py               the laws that can be fitted: what each reads, its terms, its starts
    fits.py (on descent.py)   a law's coefficients and intervals; descent.py knows only terms and points
    approaches.py             the best N and D of a budget, in three ways; the error of each budget left out
    fitting.py                `gptjax fit`: all of these on a table -> saved.py: fit.json
    report.py, plots.py       fit.json -> one screen, one HTML page, four plots
    predicting.py             `gptjax predict`: fit.json -> losses with intervals, beside observed ones

"""
