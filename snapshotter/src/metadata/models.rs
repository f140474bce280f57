//! The models that the daemon shows, by their trees. What is in a record is the business of
//! [`crate::models`].

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde_json::Value;

use super::journal::Line;
use super::{Metadata, MetadataError, TreeNumber};

/// Tree number of a model to its record as JSON.
const MODELS: TableDefinition<'_, u32, &[u8]> = TableDefinition::new("models");

impl Metadata {
    /// All models. Blocks on the disk.
    ///
    /// # Errors
    /// When the database can't be read.
    pub fn models(&self) -> Result<Vec<(TreeNumber, Value)>, MetadataError> {
        let mut writer = self.writer();
        let database = self.reopened(&mut writer)?;
        let models = read(database).map_err(|source| self.open_error(source))?;
        let parse = |(number, json): (u32, Vec<u8>)| {
            let record = serde_json::from_slice(&json).map_err(|source| MetadataError::Record {
                path: self.path.clone(),
                name: format!("model {number}"),
                source,
            })?;
            Ok((TreeNumber(number), record))
        };
        models.into_iter().map(parse).collect()
    }

    /// Remembers a model. Blocks on the disk.
    ///
    /// # Errors
    /// When the database can't be written; then it is not remembered.
    pub fn put_model(&self, number: TreeNumber, record: &Value) -> Result<(), MetadataError> {
        self.change_model(number, Some(record.to_string().as_bytes()))
    }

    /// Forgets a model. Blocks on the disk.
    ///
    /// # Errors
    /// When the database can't be written; then it is still remembered.
    pub fn remove_model(&self, number: TreeNumber) -> Result<(), MetadataError> {
        self.change_model(number, None)
    }

    fn change_model(&self, number: TreeNumber, json: Option<&[u8]>) -> Result<(), MetadataError> {
        let mut writer = self.writer();
        let database = self.reopened(&mut writer)?;
        if let Err(source) = write(database, number, json) {
            *writer = None;
            return Err(self.write_error(source));
        }
        let record = json.and_then(|json| serde_json::from_slice(json).ok()).unwrap_or(Value::Null);
        self.note(database, &[Line::Model(number.0, record)]);
        Ok(())
    }
}

pub(super) fn read(database: &Database) -> Result<Vec<(u32, Vec<u8>)>, redb::Error> {
    let table = match database.begin_read()?.open_table(MODELS) {
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
        table => table?,
    };
    let mut models = Vec::new();
    for entry in table.iter()? {
        let (number, json) = entry?;
        models.push((number.value(), json.value().to_vec()));
    }
    Ok(models)
}

fn write(database: &Database, number: TreeNumber, json: Option<&[u8]>) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    {
        let mut models = transaction.open_table(MODELS)?;
        match json {
            Some(json) => models.insert(number.0, json)?,
            None => models.remove(number.0)?,
        };
    }
    transaction.commit()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_last_until_they_are_removed() {
        let root = tempfile::tempdir().unwrap();
        let (a, b) = (TreeNumber(1), TreeNumber(2));
        let record = serde_json::json!({"reference": "localhost:5000/m:1"});
        {
            let metadata = Metadata::open(root.path()).unwrap();
            assert_eq!(metadata.models().unwrap(), []);
            metadata.put_model(a, &record).unwrap();
            metadata.put_model(b, &record).unwrap();
            metadata.remove_model(a).unwrap();
        }
        let metadata = Metadata::open(root.path()).unwrap();
        assert_eq!(metadata.models().unwrap(), [(b, record)]);
        metadata.remove_model(b).unwrap();
        metadata.remove_model(b).unwrap();
        assert_eq!(metadata.models().unwrap(), []);
    }
}
