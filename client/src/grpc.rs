//! placeholder grpc
