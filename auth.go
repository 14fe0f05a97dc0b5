package main

import (
	"cmp"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
)

const (
	coreKeyHeader = "X-Duxcore-Corekey" // X-Duxcore-CoreKey in canonical form
	minKeyBytes   = 16
	maxKeyBytes   = 4096
	newKeyBytes   = 32
)

// keyDigest is the SHA-256 of the expected header value, the core key in base64. Digests have equal length,
// as [subtle.ConstantTimeCompare] needs. The key itself is in memory only while it is loaded, and in the
// headers of open requests.
type keyDigest [sha256.Size]byte

// authorizes reports whether r carries the core key exactly once. It does not decode the value: a key has
// only one strict base64 form.
func (d keyDigest) authorizes(r *http.Request) bool {
	values := r.Header[coreKeyHeader]
	if len(values) != 1 {
		return false
	}
	sum := sha256.Sum256([]byte(values[0]))
	return subtle.ConstantTimeCompare(sum[:], d[:]) == 1
}

// loadCoreKey reads the core key from path, or creates one if the file does not exist. If the file
// exists and cannot be used, it returns an error: without a good key the daemon would serve anyone.
func loadCoreKey(path string, log *slog.Logger) (keyDigest, error) {
	key, err := readCoreKey(path, log)
	if errors.Is(err, fs.ErrNotExist) {
		if key, err = createCoreKey(path); err != nil {
			return keyDigest{}, fmt.Errorf("cannot create the core key: %w", err)
		}
		log.Info("core key created", "path", path)
	}
	if err != nil {
		return keyDigest{}, fmt.Errorf("cannot use the core key: %w", err)
	}
	return sha256.Sum256([]byte(base64.StdEncoding.EncodeToString(key))), nil
}

// readCoreKey returns the content of a regular file of minKeyBytes to maxKeyBytes.
func readCoreKey(path string, log *slog.Logger) (key []byte, err error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Mode().IsRegular() && info.Size() <= maxKeyBytes {
		if key, err = os.ReadFile(path); err != nil {
			return nil, err
		}
	}
	if len(key) < minKeyBytes { // or not read, see above
		return nil, fmt.Errorf("%s must be a file of %d to %d bytes", path, minKeyBytes, maxKeyBytes)
	}
	if info.Mode().Perm()&0o077 != 0 {
		log.Warn("others can read the core key", "path", path, "mode", info.Mode().Perm())
	}
	// The daemon that created the key may have been killed before the sync.
	if err := syncCoreKey(path); err != nil { // for example, on a file system without fsync
		log.Warn("cannot sync the core key: a power cut may lose it", "err", err)
	}
	return key, nil
}

// createCoreKey writes a random key to a new file of mode 0600, and returns the key once it is on
// disk. It never replaces a file. If it fails, it removes its file. A crash before the sync can
// leave a short file, which readCoreKey rejects.
func createCoreKey(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	key := make([]byte, newKeyBytes)
	rand.Read(key) // never returns an error
	_, err = f.Write(key)
	// All of these are called, whether one before has failed or not; the first error counts.
	if err = cmp.Or(err, f.Close(), syncCoreKey(path)); err != nil {
		os.Remove(path)
		return nil, err
	}
	return key, nil
}

// syncCoreKey makes the key file and its name durable: fsync(2) of the file and of its directory.
func syncCoreKey(path string) error {
	for _, name := range []string{path, filepath.Dir(path)} {
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		err = f.Sync()
		if err = cmp.Or(err, f.Close()); err != nil {
			return err
		}
	}
	return nil
}
