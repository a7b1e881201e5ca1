"""Parts shared by the notebooks of *Unsupervised Chest X-ray Clustering with Group Equivariant
Convolutions*.

Imports run one way: ``groups -> gconv -> models -> deepcluster <- features, kmeans``;
``data`` and ``phantom`` know ``paths``; ``metrics`` and ``plots`` take arrays and know no model.
"""

__version__ = "0.1.0"
