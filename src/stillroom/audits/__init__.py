"""Audits of runs: makes decoys and positives by a run's own recipe, asks them, and hands the answers to the tests.

The tests themselves are in ``stillroom.provenance.audit`` and know nothing of runs.
"""
