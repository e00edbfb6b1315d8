"""Circuit analyses as results of a workspace, and what the Heads and Circuits pages show of them.

methods         the methods that run on a task, as data
report          runs one of them and stores what it found
stored          opens stored results again as the objects that the methods returned
agreement       EAP and EAP-IG beside every edge patched by itself
heads           all heads scored; one head of a model: its attention on a prompt, what it composes with and copies
attention_saes  a feature of an attention-output SAE by source token and head
tables          the published circuits of GPT-2 small and attn-only-4l beside what is found here
"""
