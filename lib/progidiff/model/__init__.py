"""The networks: backbone, codec, conditioning branch, adapters, and the folder that holds them."""
