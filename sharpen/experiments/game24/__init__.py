"""From stored samples to the tables of a study: selectors, samplers and trained models, compared.

All of it is pure functions of samples and their rewards; `run` draws them.
"""
