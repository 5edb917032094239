"""Adapter + base → one model, tensor by tensor, with its own error stated.

binding     which tensor each update belongs to, and every reason to refuse
numbers     one tensor: base + s · B A, block by block, with what the output's format rounds away
output      the folder that other tools open: shards, index, configuration, tokenizer, card
merge       the whole of it
"""
