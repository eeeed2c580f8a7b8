//! Wire types of every protocol, the operation table and the error-code registry.
