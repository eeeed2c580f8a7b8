//! The `casemate` command: parses, calls, prints, and exits with a code that scripts can use.

use anyhow::Context as _;
use clap::Parser;
use cli::client::{ApiError, Client, Target};
use cli::{audit, demo, doctor, erasure, operate, supervise, verify, ws};
use service::config::Config;
use service::paths::Paths;
use std::path::PathBuf;
use std::process::ExitCode;

/// Run untrusted code, one hardware-isolated workspace each, and prove what you claim about it.
///
/// Exit codes: 0 done; 1 failed; 2 wrong usage; 3 nothing answers; 4 refused (credentials or
/// permission); 5 not found; 6 the state does not allow it. `ws exec` exits with the command's own.
#[derive(Parser)]
#[command(name = "casemate", version, max_term_width = 100)]
struct Args {
    /// Keep everything of this installation below DIR instead of /.
    #[arg(long, global = true, value_name = "DIR", default_value = "/")]
    root: PathBuf,
    /// Print JSON.
    #[arg(long, global = true)]
    json: bool,
    #[command(flatten)]
    target: Target,
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Start the platform on this machine and wait until it answers.
    Up {
        /// Stay in the foreground.
        #[arg(long)]
        foreground: bool,
    },
    /// Stop the platform and its workspaces.
    Down {
        /// Leave the workspaces running (for an upgrade).
        #[arg(long)]
        keep_workspaces: bool,
    },
    /// Show what runs.
    Status,
    /// Say what is missing or weakened, and the command that mends it.
    Doctor,
    /// Workspaces.
    #[command(subcommand)]
    Ws(ws::Command),
    /// Images that workspaces are made of.
    #[command(subcommand)]
    Image(cli::image::Command),
    /// Make an account (root).
    Account {
        /// A name for people.
        name: String,
    },
    /// Make an API key for an account (root); the secret is shown once.
    Key {
        /// The account's id.
        account: model::AccountId,
        /// A name for people.
        #[arg(default_value = "cli")]
        name: String,
    },
    /// The key management service (root).
    #[command(subcommand)]
    Kms(Kms),
    /// The audit logs.
    #[command(subcommand)]
    Audit(audit::Command),
    /// Verify an erasure receipt offline.
    Erasure {
        /// The receipt's file, `-` for standard input.
        receipt: PathBuf,
        /// The KMS's public key; the installation's own unless given.
        #[arg(long)]
        key: Option<PathBuf>,
    },
    /// Check claims: what was done, what was seen, pass or fail (root).
    Verify(verify::Options),
    /// Start the platform, show what it does with real figures, stop it (root).
    Quickstart(demo::Options),
    /// The supervisor itself; `up` starts it.
    #[command(hide = true)]
    Supervise,
    /// A call of a guest's agent, as the edge makes it; the token comes from standard input.
    #[command(hide = true)]
    Agent {
        /// The workspace.
        workspace: model::WorkspaceId,
        /// Its address.
        ip: std::net::Ipv4Addr,
        /// The path.
        path: String,
    },
    /// A call of a guest's raw-token port; the token comes from standard input.
    #[command(hide = true)]
    AgentRaw {
        /// Its address.
        ip: std::net::Ipv4Addr,
        /// The path.
        path: String,
    },
    /// Whether a guest's agent answers plain HTTP on its TLS port.
    #[command(hide = true)]
    AgentPlain {
        /// Its address.
        ip: std::net::Ipv4Addr,
    },
    /// Whether a guest's agent answers a client that is not the edge.
    #[command(hide = true)]
    AgentStranger {
        /// The workspace.
        workspace: model::WorkspaceId,
        /// Its address.
        ip: std::net::Ipv4Addr,
    },
    /// Ask the KMS as the process whose user this is; the request comes from standard input.
    #[command(hide = true)]
    KmsAsk,
    /// Dial a TCP address and say what happened; run inside a network namespace by the checks.
    #[command(hide = true)]
    Dial {
        /// Address and port.
        address: std::net::SocketAddr,
        /// Own address.
        #[arg(long)]
        from: Option<std::net::IpAddr>,
        /// How long, ms.
        #[arg(long, default_value_t = 600)]
        wait_ms: u64,
    },
    /// Count datagrams; run inside a network namespace by the checks.
    #[command(hide = true)]
    Listen {
        /// UDP port.
        port: u16,
    },
}

#[derive(clap::Subcommand)]
enum Kms {
    /// Sealed or not, epoch, counts.
    Status,
    /// Unseal with the passphrase from standard input.
    Unseal,
    /// New epoch now: what was destroyed can't be revived from any backup.
    Rotate,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match run(args) {
        Ok(code) => ExitCode::from(code),
        Err(e) => {
            // A closed pipe (`| head`) is nobody's error.
            if e.root_cause()
                .downcast_ref::<std::io::Error>()
                .is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
            {
                return ExitCode::SUCCESS;
            }
            eprintln!("casemate: {e:#}");
            ExitCode::from(exit_code(&e))
        }
    }
}

fn run(args: Args) -> anyhow::Result<u8> {
    let paths = Paths::new(std::path::absolute(&args.root).context("--root")?);
    let config = Config::load(&paths.config())?;
    match args.command {
        Command::Up { foreground } => {
            let passphrase = passphrase_if_new(&paths, &config)?;
            if foreground {
                supervise::install::install(&paths, &config, passphrase.as_deref())?;
                supervise::supervise(&paths, &config)?;
                return Ok(0);
            }
            let bar = cli::progress::spinner();
            supervise::up(&paths, &config, passphrase.as_deref(), |what| {
                bar.set_message(format!("starting: {what}"));
            })?;
            bar.finish_and_clear();
            println!(
                "up; control API and gateway at {}",
                urls(&config).join(" and ")
            );
            if config.kms.unseal == api::kms::Unseal::Passphrase
                && operate::kms_status(&paths)?.sealed
            {
                println!("the KMS is sealed: `casemate kms unseal` opens it");
            }
        }
        Command::Down { keep_workspaces } => {
            if supervise::down(&paths, keep_workspaces)? {
                println!("down");
            } else {
                println!("it was not up");
            }
        }
        Command::Status => return status(&paths, args.json),
        Command::Doctor => return doctor::run(&paths, &config, args.json),
        Command::Ws(command) => {
            let client = Client::from_env(&args.target)?;
            return runtime()?.block_on(ws::run(&client, command, args.json));
        }
        Command::Image(command) => return cli::image::run(&paths, command, args.json),
        Command::Account { name } => {
            let account = operate::account_create(&paths, &name)?;
            println!(
                "{}",
                if args.json {
                    serde_json::json!({ "account": account }).to_string()
                } else {
                    account.to_string()
                }
            );
        }
        Command::Key { account, name } => {
            let key = operate::key_create(&paths, &account, &name)?;
            if args.json {
                println!("{}", serde_json::to_string(&key)?);
            } else {
                println!("export CASEMATE_CLIENT_ID={}", key.client_id);
                println!("export CASEMATE_CLIENT_SECRET={}", key.client_secret);
            }
        }
        Command::Kms(command) => {
            let status = match command {
                Kms::Status => operate::kms_status(&paths)?,
                Kms::Unseal => {
                    let phrase = operate::read_passphrase("passphrase")?;
                    operate::kms_unseal(&paths, &phrase)?
                }
                Kms::Rotate => operate::kms_rotate(&paths)?,
            };
            println!("{}", serde_json::to_string_pretty(&status)?);
        }
        Command::Audit(command) => return audit::run(&paths, &config, &command, args.json),
        Command::Erasure { receipt, key } => {
            return erasure::run(&paths, &receipt, key.as_deref(), args.json);
        }
        Command::Verify(options) => {
            return runtime()?.block_on(verify::run(&paths, &config, &options, args.json));
        }
        Command::Quickstart(options) => return demo::run(&paths, &config, &options),
        Command::Supervise => supervise::supervise(&paths, &config)?,
        Command::Agent {
            workspace,
            ip,
            path,
        } => {
            let token = stdin_token()?;
            let call = cli::agent::over_mtls(&paths, &workspace, ip, &path, &token);
            println!("{}", runtime()?.block_on(call)?);
        }
        Command::AgentRaw { ip, path } => {
            let token = stdin_token()?;
            println!(
                "{}",
                runtime()?.block_on(cli::agent::raw(ip, &path, &token))?
            );
        }
        Command::AgentPlain { ip } => {
            println!("{}", runtime()?.block_on(cli::agent::plain(ip))?);
        }
        Command::AgentStranger { workspace, ip } => {
            println!(
                "{}",
                runtime()?.block_on(cli::agent::as_stranger(&paths, &workspace, ip))?
            );
        }
        Command::KmsAsk => {
            use std::io::Read as _;
            let op = serde_json::from_reader(std::io::stdin().take(64 << 10))?;
            println!("{}", operate::kms_ask(&paths, &op));
        }
        Command::Dial {
            address,
            from,
            wait_ms,
        } => {
            println!("{}", cli::dial::dial(address, from, wait_ms));
        }
        Command::Listen { port } => cli::dial::listen(port)?,
    }
    Ok(0)
}

/// A new installation under a passphrase asks for it; an old one asks at `kms unseal`.
fn passphrase_if_new(paths: &Paths, config: &Config) -> anyhow::Result<Option<String>> {
    if config.kms.unseal == api::kms::Unseal::Passphrase
        && !paths.trust().join(service::trust::KMS).exists()
    {
        return operate::read_passphrase("new passphrase for the KMS").map(Some);
    }
    Ok(None)
}

fn status(paths: &Paths, as_json: bool) -> anyhow::Result<u8> {
    let all = supervise::status_of(paths);
    let up = all.iter().all(|s| s.ready);
    if as_json {
        println!("{}", serde_json::to_string(&all)?);
    } else {
        for s in &all {
            let pid = s.pid.map_or("-".to_owned(), |p| p.to_string());
            println!(
                "{:<16} {:<8} {}",
                s.name,
                pid,
                if s.ready { "ready" } else { "down" }
            );
        }
    }
    Ok(if up { 0 } else { 3 })
}

fn urls(config: &Config) -> Vec<String> {
    cli::urls(config).into_iter().collect()
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("start the runtime")
}

/// A token from standard input: never on a command line.
fn stdin_token() -> anyhow::Result<String> {
    use std::io::Read as _;
    let mut token = String::new();
    std::io::stdin().take(8 << 10).read_to_string(&mut token)?;
    Ok(token.trim().to_owned())
}

fn exit_code(e: &anyhow::Error) -> u8 {
    let by_status = |status: u16| match status {
        0 | 502..=504 => 3,
        401 | 403 => 4,
        404 => 5,
        409 => 6,
        _ => 1,
    };
    if let Some(e) = e.downcast_ref::<ApiError>() {
        return by_status(e.status);
    }
    if let Some(e) = e.downcast_ref::<api::Error>() {
        return by_status(e.code.http_status());
    }
    1
}
