"""Us and our rivals, side by side: `python -m benchmarks rivals`.

`rows` says what is measured and which bars there are, `work` does it, `engines/` has one adapter an engine, `host` is the
process an engine lives in, `keeper` ends whatever descended from it, `session` talks to it, `program` runs the rounds, `report`
tells.
"""
