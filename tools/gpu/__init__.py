"""`make gpu`: what only a GPU can show, unattended, with torch, triton, numpy and pytest alone.

    python -m tools.gpu [step ...]

`plan.py` shares a fixed time out over the steps, `steps.py` runs them as processes (`process.py`),
and `record.py` keeps what they say, after every part: gpu.json, gpu.md (`page.py`) and gpu.log.
docs/gpu-run.md is the manual.
"""
