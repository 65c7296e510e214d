"""The NVFP4 inference pipeline of DeepSeek-V4, to explore, test and teach."""
