"""Scaling laws and their fits to runs. The data flow, from runs to a prediction:

    rows.py -> table.py       any CSV, JSONL, sweep or run folders -> a Table of N, D, C and loss, or one clear error
    laws.py                   the formulas of the papers, NumPy in and out; recipes.py: batch and learning rate
    families.py               the laws that can be fitted: their inputs, terms and starts
    fits.py (on descent.py)   a law's coefficients and intervals; descent.py has terms and points alone
    approaches.py             optimal N and D of a budget, in three ways; the error of each budget left out
    fitting.py                `gptjax fit`: all of these on a table -> saved.py: fit.json
    report.py, plots.py       fit.json -> one screen, one HTML page, four plots
    predicting.py             `gptjax predict`: fit.json -> losses with intervals, beside observed ones

Parameters and FLOPs of a decoder are counted in model/counts.py.
"""
