"""Deep clustering of chest X-rays with AlexNet and a group-equivariant CNN.

The files here are the method, in reading order: groups, gconv, models, images, features, kmeans,
deepcluster, runs, metrics; paths, parallel, notebooks and __main__ support them. The folders are
wings: fast, data, study, plots, explore. Without one, the method still trains."""

__version__ = "0.1.0"
