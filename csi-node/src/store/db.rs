//! Nix's own database of valid paths: schema 10, as Nix 2.8 to 2.36 and Lix read and write it.

use std::collections::HashSet;
use std::fs::{self, File};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use std::{io, str::FromStr as _};

use nix_csi_store::{NarHash, NarInfo, StorePath};
use rusqlite::{Connection, OptionalExtension as _, TransactionBehavior, params};
use rustix::fs::FlockOperation;

use super::layout::Layout;
use crate::path_error::PathError;

/// Written without a newline: with one, every Nix calls the schema corrupt.
const SCHEMA: &str = "10";

const TABLES: &str = "
create table if not exists ValidPaths (
    id integer primary key autoincrement not null,
    path text unique not null,
    hash text not null,
    registrationTime integer not null,
    deriver text,
    narSize integer,
    ultimate integer,
    sigs text,
    ca text
);
create table if not exists Refs (
    referrer integer not null,
    reference integer not null,
    primary key (referrer, reference),
    foreign key (referrer) references ValidPaths(id) on delete cascade,
    foreign key (reference) references ValidPaths(id) on delete restrict
);
create index if not exists IndexReferrer on Refs(referrer);
create index if not exists IndexReference on Refs(reference);
create trigger if not exists DeleteSelfRefs before delete on ValidPaths
  begin
    delete from Refs where referrer = old.id and reference = old.id;
  end;
create table if not exists DerivationOutputs (
    drv integer not null,
    id text not null,
    path text not null,
    primary key (drv, id),
    foreign key (drv) references ValidPaths(id) on delete cascade
);
create index if not exists IndexDerivationOutputs on DerivationOutputs(path);
";

/// Why the database did not answer.
#[derive(Debug, thiserror::Error)]
pub enum DatabaseError {
    /// A file beside the database.
    #[error(transparent)]
    Io(#[from] PathError),
    /// A schema that this program does not know.
    #[error("{} says schema {found:?}, this program knows {SCHEMA}", path.display())]
    Schema {
        /// The file that says so.
        path: PathBuf,
        /// What it says.
        found: String,
    },
    /// SQLite.
    #[error("the store's database")]
    Sqlite(#[from] rusqlite::Error),
    /// A row that no Nix would write.
    #[error("the store's database has {0:?} where a store path must be")]
    Row(String),
    /// A reference that is neither valid nor being registered.
    #[error("{path} refers to {reference}, which is not valid")]
    DanglingReference {
        /// Who refers.
        path: StorePath,
        /// To what.
        reference: StorePath,
    },
}

/// What the store knows about a valid path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathInfo {
    /// The path.
    pub path: StorePath,
    /// SHA-256 of its NAR.
    pub nar_hash: NarHash,
    /// Length of its NAR.
    pub nar_size: u64,
    /// What it refers to, itself included.
    pub references: Vec<StorePath>,
    /// The derivation that built it.
    pub deriver: Option<StorePath>,
    /// Its signatures, so that it can be proved again elsewhere.
    pub signatures: Vec<String>,
    /// Its content address.
    pub ca: Option<String>,
}

impl From<NarInfo> for PathInfo {
    fn from(info: NarInfo) -> Self {
        Self {
            path: info.path,
            nar_hash: info.nar_hash,
            nar_size: info.nar_size,
            references: info.references,
            deriver: info.deriver,
            signatures: info.signatures.iter().map(ToString::to_string).collect(),
            ca: info.ca,
        }
    }
}

/// An open database. One connection: SQLite has one writer anyway, and every question here is short.
pub(super) struct Database {
    connection: Mutex<Connection>,
    /// Shared as long as the store is open: only a schema migration wants it alone.
    _big_lock: File,
}

impl Database {
    pub(super) fn open(layout: &Layout) -> Result<Self, DatabaseError> {
        let dir = layout.db_dir();
        let big_lock = dir.join("big-lock");
        let lock = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&big_lock)
            .map_err(PathError::on("open", &big_lock))?;
        rustix::fs::flock(&lock, FlockOperation::LockShared).map_err(PathError::on("lock", &big_lock))?;
        let schema = dir.join("schema");
        match fs::read_to_string(&schema) {
            Ok(found) if found == SCHEMA => {}
            Ok(found) => return Err(DatabaseError::Schema { path: schema, found }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(PathError::on("read", &schema)(error).into()),
        }
        let connection = Connection::open(dir.join("db.sqlite"))?;
        connection.busy_timeout(Duration::from_mins(1))?;
        connection.pragma_update(None, "foreign_keys", true)?;
        connection.pragma_update(None, "journal_mode", "wal")?;
        connection.pragma_update(None, "synchronous", "normal")?;
        connection.pragma_update(None, "wal_autocheckpoint", 40_000)?;
        connection.execute_batch(TABLES)?;
        // Last: a database without it is one whose tables may be missing.
        if !schema.exists() {
            let beside = dir.join(".schema");
            fs::write(&beside, SCHEMA)
                .and_then(|()| fs::rename(&beside, &schema))
                .map_err(PathError::on("write", &schema))?;
        }
        Ok(Self { connection: Mutex::new(connection), _big_lock: lock })
    }

    fn connection(&self) -> MutexGuard<'_, Connection> {
        // A panic cannot leave a transaction half done: dropping one rolls it back.
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn valid(&self, paths: &[StorePath]) -> Result<HashSet<StorePath>, DatabaseError> {
        let connection = self.connection();
        let mut query = connection.prepare_cached("select 1 from ValidPaths where path = ?")?;
        let mut valid = HashSet::new();
        for path in paths {
            if query.exists([path.to_string()])? {
                valid.insert(path.clone());
            }
        }
        Ok(valid)
    }

    pub(super) fn closure(&self, roots: &[StorePath]) -> Result<Vec<StorePath>, DatabaseError> {
        let connection = self.connection();
        let mut query = connection.prepare_cached(
            "with recursive Closure(id) as (
                 select id from ValidPaths where path in (select value from json_each(?))
                 union
                 select reference from Refs join Closure on referrer = Closure.id)
             select path from ValidPaths join Closure using (id) order by path",
        )?;
        let roots: Vec<_> = roots.iter().map(ToString::to_string).collect();
        let rows = query.query_map([serde_json::json!(roots).to_string()], |row| row.get::<_, String>(0))?;
        rows.map(|row| {
            let path = row?;
            StorePath::from_str(&path).map_err(|_| DatabaseError::Row(path))
        })
        .collect()
    }

    /// All rows first, then all references, so that the order of `infos` does not matter.
    pub(super) fn register(&self, infos: &[&PathInfo]) -> Result<(), DatabaseError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut connection = self.connection();
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        {
            let mut insert = transaction.prepare_cached(
                "insert into ValidPaths (path, hash, registrationTime, deriver, narSize, sigs, ca)
                 values (?, ?, ?, ?, ?, ?, ?)",
            )?;
            let mut find = transaction.prepare_cached("select id from ValidPaths where path = ?")?;
            let mut refer = transaction
                .prepare_cached("insert or ignore into Refs (referrer, reference) values (?, ?)")?;
            let mut ids = Vec::with_capacity(infos.len());
            for info in infos {
                insert.execute(params![
                    info.path.to_string(),
                    info.nar_hash.to_base16(),
                    now.as_secs().cast_signed(),
                    info.deriver.as_ref().map(ToString::to_string),
                    info.nar_size.cast_signed(),
                    (!info.signatures.is_empty()).then(|| info.signatures.join(" ")),
                    info.ca,
                ])?;
                ids.push(transaction.last_insert_rowid());
            }
            for (info, id) in infos.iter().zip(ids) {
                for reference in &info.references {
                    let to: Option<i64> =
                        find.query_row([reference.to_string()], |row| row.get(0)).optional()?;
                    let to = to.ok_or_else(|| DatabaseError::DanglingReference {
                        path: info.path.clone(),
                        reference: reference.clone(),
                    })?;
                    refer.execute([id, to])?;
                }
            }
        }
        Ok(transaction.commit()?)
    }
}
