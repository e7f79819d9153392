"""The disk half: digests, manifests, file formats, the tensor store and the catalog."""
