"""`python -m mmkernels bench`: mmkernels beside its best peers, at the shapes of real models.

A suite (`suites.py`) is a list of cases (`case.py`): one problem each, with every implementation
that solves it. A run (`run.py`) measures the ceilings of the machine, then each case
(`measure.py`): first it holds the results of every implementation to the error rule, then it times
them in turns. All of it goes into one JSON, from which the tables, the CSV and the plots are made
(`report.py`).

It needs torch and numpy; peers and models take part where their libraries are installed.
"""
