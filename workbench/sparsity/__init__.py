"""Activation sparsity: how little of a model is used on each token, and what using less costs.

measure      what is near zero, by layer, neuron and position, in one streamed pass
enforce      the methods of `methods/` applied while the model runs: loss and KL against sparsity, FLOPs saved
at_cost      the share of zeros at a given cost, by search
ppl          PPL-p%: the sparsity that costs ln(1 + p) nats
attention    share of attention that patterns of keys keep, the loss when all heads are restricted to them, and sinks
attention_heads  one head at a time, heads left whole; attention_rank: how many directions a head looks with
neurons      one neuron from near: its values and where they are largest
sae_codes    sparsity of SAE codes; how few terms reconstruct a token, against PCA and other bases
measurements all of it as results of a workspace; report makes them under one name, compare sets several side by side
"""
