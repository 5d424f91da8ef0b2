"""What a person types and reads: flags, the rules between them, messages. It imports no other room."""
