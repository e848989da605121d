"""The self-test of capture servers: are the features that they give what the name of a feature promises?"""
