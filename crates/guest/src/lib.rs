//! The agent in the guest: `/init` of the initramfs, and the workspace's runtime API.
//!
//! `boot` prepares a machine without identity, `rehearse` warms it, `attach` makes it one
//! workspace, `http` serves that workspace, `power` ends it.
//!
//! Must never: hold a secret of the platform's (it has its own identity key and public
//! verifiers), write what a workspace's process prints anywhere but to the caller (SEE-1), or
//! take a request without a valid token (ACC-3).
#![allow(unsafe_code)] // ioctls, setns and the first moments of PID 1; each block says why.

pub mod archive;
pub mod attach;
pub mod auth;
pub mod boot;
pub mod channel;
pub mod clock;
pub mod exec;
pub mod fsroot;
pub mod http;
pub mod identity;
pub mod init;
pub mod launch;
pub mod limits;
pub mod net;
pub mod power;
pub mod put_back;
pub mod reap;
pub mod rehearse;
pub mod rootfs;
pub mod standin;
mod sys;
pub mod tar;
pub mod untar;
