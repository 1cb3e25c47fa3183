"""The cost model behind `megatron-trd plan`: memory per GPU, time per step, and the layouts that fit.

Arithmetic on a configuration and the shapes of two models; it loads no weights. docs/scaling.md has the formulas.
"""
