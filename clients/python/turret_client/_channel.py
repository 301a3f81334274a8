"""What the channels of both clients have in common."""

DEFAULT_ADDRESS = "127.0.0.1:50051"

CHANNEL_OPTIONS = (("grpc.max_receive_message_length", 64 * 1024 * 1024),)
