"""The compiler: trace, link, match, insert, fold. torch.fx and networkx; it knows nothing of training."""
