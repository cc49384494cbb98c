"""Models of other libraries on mmkernels.

`mmkernels.integrations.transformers` serves models of transformers, `mmkernels.integrations.sdpa`
those that call torch's `scaled_dot_product_attention`. Each is imported by name.
"""
