"""What our own servers share with the SDK. No stability is promised: programs of others do not import it."""
