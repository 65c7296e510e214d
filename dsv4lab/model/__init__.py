"""DeepSeek-V4 as published, on the layers of dsv4lab."""
