"""Circuit analyses as results of a workspace, and what the Heads and Circuits pages show of them.

report    runs a method on a task and stores what it found
stored    opens stored results again as the objects that the methods returned
heads     one head of a model: its attention on a prompt, what it composes with, what it copies
tables    the published circuits of GPT-2 small and attn-only-4l beside what is found here
"""
