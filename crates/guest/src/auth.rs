//! Who may call: layer 2 of two (ACC-2, ACC-3). Nothing is taken from an address, a header or a
//! path: only a token that this workspace's verifiers hold good.
//!
//! - gateway tokens (port 9991, inside mutual TLS with the edge): EdDSA JWT, `aud` = the
//!   workspace, `epoch` ≥ the highest this guest has seen.
//! - the raw connection token (port 9990): its SHA-256, compared in constant time.
//!
//! The token state only moves forward (`seq` and `epoch` grow); moving it ends what runs under
//! an older one at once. Must never store a token.

use api::context;
use api::mint::{GatewayClaims, TokenState};
use model::WorkspaceId;
use seal::jwt::{self, JwtError};
use seal::sign::{Signed, VerifyingKey};
use tokio::sync::watch;

/// Where a request came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Door {
    /// 9991: the edge, in mutual TLS.
    Edge,
    /// 9990: anyone that the firewall lets through.
    Direct,
}

/// What a request may go on under, as long as the token state allows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Grant {
    /// A gateway token of this epoch.
    Gateway {
        /// The token's epoch.
        epoch: u64,
    },
    /// The raw token with this hash.
    Raw {
        /// SHA-256 of the token, hex.
        hash: String,
    },
}

/// Why a request is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No token, or none that is good here.
    #[error("a valid token for this workspace is needed")]
    Unauthorized,
    /// It was good until its time ended.
    #[error("the token has expired; get a new one")]
    Expired,
    /// The workspace's runtime API is switched off.
    #[error("the runtime API of this workspace is disabled")]
    Disabled,
}

/// Why a token state is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// Not a token state that mint signed for this workspace.
    #[error("not a token state of this workspace signed by mint")]
    Invalid,
    /// Older than what is held.
    #[error("older than the token state that is held")]
    Stale,
}

/// The workspace's verifiers and its token state.
pub struct Auth {
    workspace: WorkspaceId,
    mint_key: VerifyingKey,
    gateway_key: VerifyingKey,
    held: watch::Sender<Held>,
}

/// The token state that counts.
struct Held {
    state: TokenState,
    /// As mint signed it. It comes again with each start and wake, and need not be verified again.
    signed: String,
}

impl Auth {
    /// Starts from a signed token state.
    ///
    /// # Errors
    /// If mint did not sign it for this workspace.
    pub fn new(
        workspace: WorkspaceId,
        mint_key: VerifyingKey,
        gateway_key: VerifyingKey,
        signed_state: &str,
    ) -> Result<Self, StateError> {
        let state = state_verify(&workspace, &mint_key, signed_state)?;
        let verified = (state, signed_state.to_owned());
        Ok(Self::of(workspace, mint_key, gateway_key, verified))
    }

    /// Starts from a token state that [`state_verify`] gave, and what it was given.
    #[must_use]
    pub fn of(
        workspace: WorkspaceId,
        mint_key: VerifyingKey,
        gateway_key: VerifyingKey,
        (state, signed): (TokenState, String),
    ) -> Self {
        Self {
            workspace,
            mint_key,
            gateway_key,
            held: watch::Sender::new(Held { state, signed }),
        }
    }

    /// Judges a request by its `Authorization` header.
    ///
    /// # Errors
    /// Why it is refused.
    pub fn check(
        &self,
        door: Door,
        authorization: Option<&str>,
        now_s: i64,
    ) -> Result<Grant, Refusal> {
        let token = authorization
            .and_then(bearer)
            .ok_or(Refusal::Unauthorized)?;
        let grant = match door {
            Door::Edge => self.check_gateway(token, now_s)?,
            Door::Direct => self.check_raw(token)?,
        };
        if !self.held.borrow().state.enabled {
            return Err(Refusal::Disabled);
        }
        Ok(grant)
    }

    /// Takes a newer signed token state; what an older one allowed ends at once. Taking the same
    /// one again changes nothing.
    ///
    /// # Errors
    /// If it is not mint's for this workspace, or older than what is held.
    pub fn state_raise(&self, signed_state: &str) -> Result<TokenState, StateError> {
        {
            let held = self.held.borrow();
            if held.signed == signed_state {
                return Ok(held.state.clone());
            }
        }
        let new = state_verify(&self.workspace, &self.mint_key, signed_state)?;
        let mut result = Ok(());
        self.held.send_if_modified(
            |Held {
                 state: held,
                 signed,
             }| {
                // A workspace that is gone stays gone.
                let forward =
                    new.seq > held.seq && new.epoch >= held.epoch && (new.gone || !held.gone);
                if forward {
                    held.clone_from(&new);
                    signed.clear();
                    signed.push_str(signed_state);
                } else if *held != new {
                    result = Err(StateError::Stale);
                }
                forward
            },
        );
        result.map(|()| new)
    }

    /// Ends when `grant` no longer holds.
    pub fn revoked(&self, grant: Grant) -> impl Future<Output = ()> + Send + 'static {
        let mut held = self.held.subscribe();
        async move {
            // An error means that the service is gone, and every request with it.
            let _ = held.wait_for(|held| !holds(&grant, &held.state)).await;
        }
    }

    /// Whose it is.
    #[must_use]
    pub fn workspace(&self) -> &WorkspaceId {
        &self.workspace
    }

    /// The token state now.
    #[must_use]
    pub fn state(&self) -> TokenState {
        self.held.borrow().state.clone()
    }

    fn check_gateway(&self, token: &str, now_s: i64) -> Result<Grant, Refusal> {
        let keys = [self.gateway_key];
        let claims: GatewayClaims = jwt::verify(token, &keys, self.workspace.as_str(), now_s)
            .map_err(|error| match error {
                JwtError::Expired => Refusal::Expired,
                JwtError::Invalid(_) => Refusal::Unauthorized,
            })?;
        let state = &self.held.borrow().state;
        let ours = claims.iss == "casemate" && claims.sub == state.account.as_str();
        if !ours || claims.epoch < state.epoch || state.gone {
            return Err(Refusal::Unauthorized);
        }
        Ok(Grant::Gateway {
            epoch: claims.epoch,
        })
    }

    fn check_raw(&self, token: &str) -> Result<Grant, Refusal> {
        let hash = hex::encode(seal::hash::sha256(token.as_bytes()));
        let state = &self.held.borrow().state;
        let equal = seal::hash::ct_eq(hash.as_bytes(), state.raw_hash.as_bytes());
        if !equal || state.gone {
            return Err(Refusal::Unauthorized);
        }
        Ok(Grant::Raw { hash })
    }
}

fn holds(grant: &Grant, state: &TokenState) -> bool {
    let valid = match grant {
        Grant::Gateway { epoch } => *epoch >= state.epoch,
        Grant::Raw { hash } => *hash == state.raw_hash,
    };
    valid && state.enabled && !state.gone
}

fn bearer(header: &str) -> Option<&str> {
    let (scheme, token) = header.split_once(' ')?;
    let token = token.trim_matches(' ');
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
}

/// The token state in `signed`, if `mint_key` signed it for `workspace`.
///
/// # Errors
/// [`StateError::Invalid`].
pub fn state_verify(
    workspace: &WorkspaceId,
    mint_key: &VerifyingKey,
    signed: &str,
) -> Result<TokenState, StateError> {
    let state: TokenState = Signed::parse(signed)
        .and_then(|signed| signed.verify(mint_key, context::TOKEN_STATE))
        .map_err(|_| StateError::Invalid)?;
    if state.workspace == *workspace {
        Ok(state)
    } else {
        Err(StateError::Invalid)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use seal::sign::SigningKey;

    const WS: &str = "ws_0123456789abcdef";
    const ACCOUNT: &str = "acct_0123456789abcdef";
    const RAW: &str = "5ec2e7";
    const NOW_S: i64 = 1_800_000_000;

    fn mint() -> SigningKey {
        SigningKey::from_seed(&[1; 32])
    }

    fn gateway() -> SigningKey {
        SigningKey::from_seed(&[2; 32])
    }

    fn state(seq: u64, epoch: u64) -> TokenState {
        TokenState {
            workspace: WS.parse().unwrap(),
            account: ACCOUNT.parse().unwrap(),
            epoch,
            raw_hash: hex::encode(seal::hash::sha256(RAW.as_bytes())),
            enabled: true,
            gone: false,
            identity_pub: String::new(),
            seq,
        }
    }

    fn signed(state: &TokenState) -> String {
        Signed::new(&mint(), context::TOKEN_STATE, state).to_string()
    }

    fn auth(state: &TokenState) -> Auth {
        let (mint, gateway) = (mint().public(), gateway().public());
        Auth::new(WS.parse().unwrap(), mint, gateway, &signed(state)).unwrap()
    }

    fn claims(epoch: u64) -> GatewayClaims {
        GatewayClaims {
            iss: "casemate".into(),
            sub: ACCOUNT.into(),
            aud: WS.into(),
            iat: NOW_S,
            exp: NOW_S + 3600,
            jti: "00".repeat(16),
            epoch,
        }
    }

    fn check_jwt(auth: &Auth, claims: &GatewayClaims, now_s: i64) -> Result<Grant, Refusal> {
        let header = format!("Bearer {}", jwt::sign(&gateway(), claims));
        auth.check(Door::Edge, Some(&header), now_s)
    }

    #[test]
    fn a_gateway_token_opens_its_own_workspace_only() {
        let auth = auth(&state(1, 3));
        assert_eq!(
            check_jwt(&auth, &claims(3), NOW_S),
            Ok(Grant::Gateway { epoch: 3 })
        );
        assert!(check_jwt(&auth, &claims(4), NOW_S).is_ok());
        let refused = Err(Refusal::Unauthorized);
        assert_eq!(check_jwt(&auth, &claims(2), NOW_S), refused);
        let other = GatewayClaims {
            aud: "ws_ffffffffffffffff".into(),
            ..claims(3)
        };
        assert_eq!(check_jwt(&auth, &other, NOW_S), refused);
        let other = GatewayClaims {
            iss: "other".into(),
            ..claims(3)
        };
        assert_eq!(check_jwt(&auth, &other, NOW_S), refused);
        let other = GatewayClaims {
            sub: "acct_ffffffffffffffff".into(),
            ..claims(3)
        };
        assert_eq!(check_jwt(&auth, &other, NOW_S), refused);
        assert_eq!(
            check_jwt(&auth, &claims(3), NOW_S + 3700),
            Err(Refusal::Expired)
        );
        let header = format!("Bearer {}", jwt::sign(&mint(), &claims(3)));
        assert_eq!(auth.check(Door::Edge, Some(&header), NOW_S), refused);
    }

    #[test]
    fn the_doors_take_their_own_kind_of_token_only() {
        let auth = auth(&state(1, 3));
        let (raw, jwt) = (format!("Bearer {RAW}"), jwt::sign(&gateway(), &claims(3)));
        assert!(auth.check(Door::Direct, Some(&raw), NOW_S).is_ok());
        assert!(
            auth.check(Door::Direct, Some(&format!("bearer {RAW}")), NOW_S)
                .is_ok()
        );
        for (door, header) in [
            (Door::Edge, Some(raw.as_str())),
            (Door::Direct, Some(&format!("Bearer {jwt}"))),
            (Door::Direct, None),
            (Door::Direct, Some("Bearer ")),
            (Door::Direct, Some("Bearer")),
            (Door::Direct, Some(&format!("Basic {RAW}"))),
            (Door::Direct, Some(RAW)),
            (Door::Direct, Some("Bearer 5ec2e8")),
            (Door::Edge, Some("Bearer a.b.c")),
        ] {
            assert_eq!(
                auth.check(door, header, NOW_S),
                Err(Refusal::Unauthorized),
                "{header:?}"
            );
        }
    }

    #[test]
    fn states_only_move_forward() {
        let auth = auth(&state(5, 3));
        assert!(auth.state_raise(&signed(&state(5, 3))).is_ok());
        for stale in [state(4, 3), state(5, 4), state(6, 2)] {
            assert_eq!(auth.state_raise(&signed(&stale)), Err(StateError::Stale));
        }
        let other = TokenState {
            workspace: "ws_ffffffffffffffff".parse().unwrap(),
            ..state(9, 9)
        };
        assert_eq!(auth.state_raise(&signed(&other)), Err(StateError::Invalid));
        let forged = Signed::new(&gateway(), context::TOKEN_STATE, &state(9, 9)).to_string();
        assert_eq!(auth.state_raise(&forged), Err(StateError::Invalid));
        let kind = Signed::new(&mint(), context::POLICY, &state(9, 9)).to_string();
        assert_eq!(auth.state_raise(&kind), Err(StateError::Invalid));
        assert!(auth.state_raise(&signed(&state(7, 4))).is_ok());
        assert_eq!(
            check_jwt(&auth, &claims(3), NOW_S),
            Err(Refusal::Unauthorized)
        );
        let gone = TokenState {
            gone: true,
            ..state(8, 4)
        };
        assert!(auth.state_raise(&signed(&gone)).is_ok());
        assert_eq!(
            auth.state_raise(&signed(&state(9, 4))),
            Err(StateError::Stale)
        );
    }

    #[tokio::test]
    async fn raising_ends_what_ran_before() {
        let auth = auth(&state(1, 3));
        let old = auth.revoked(Grant::Gateway { epoch: 3 });
        let new = auth.revoked(Grant::Gateway { epoch: 4 });
        let raw = auth.revoked(Grant::Raw {
            hash: state(1, 3).raw_hash,
        });
        auth.state_raise(&signed(&state(2, 4))).unwrap();
        old.await;
        let disabled = TokenState {
            enabled: false,
            ..state(3, 4)
        };
        auth.state_raise(&signed(&disabled)).unwrap();
        new.await;
        raw.await;
        assert_eq!(check_jwt(&auth, &claims(4), NOW_S), Err(Refusal::Disabled));
    }
}
