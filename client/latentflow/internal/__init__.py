"""Modules that our own servers share with the SDK. They may change in any release; other programs do not import them."""
