"""The gym: a task whose first errors are known exactly, and the tiny model that the demo starts from.

problems    chains of arithmetic, their solutions and the first error of a response
texts       the wording of the task, and the texts that the tiny model is trained on
metric      how often the reflector quotes exactly the first error
pretrain    trains the tiny model: python -m rosd_jax.gym --out=models/gym
"""
