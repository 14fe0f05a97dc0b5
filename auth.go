package main

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
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

// coreKey is the SHA-256 sum of the core key: of one length whatever the key's, and
// no secret to guess at when it shows in a core dump.
type coreKey [sha256.Size]byte

// authorizes reports whether r carries the core key, once. It compares sums because
// [subtle.ConstantTimeCompare] returns early on unequal lengths.
func (k coreKey) authorizes(r *http.Request) bool {
	values := r.Header[coreKeyHeader]
	if len(values) != 1 {
		return false
	}
	key, err := base64.StdEncoding.Strict().DecodeString(values[0])
	if err != nil {
		return false
	}
	sum := sha256.Sum256(key)
	return subtle.ConstantTimeCompare(sum[:], k[:]) == 1
}

// loadCoreKey reads the core key from path, or creates one there if nothing is there.
// A key that is short, long, unreadable or no regular file is an error: an agent
// without a good key would be open to everyone.
func loadCoreKey(path string, log *slog.Logger) (coreKey, error) {
	key, err := readCoreKey(path, log)
	if errors.Is(err, fs.ErrNotExist) {
		if err := createCoreKey(path); err != nil {
			return coreKey{}, fmt.Errorf("cannot create the core key: %w", err)
		}
		log.Info("core key created", "path", path)
		key, err = readCoreKey(path, log)
	}
	if err != nil {
		return coreKey{}, fmt.Errorf("cannot use the core key: %w", err)
	}
	return sha256.Sum256(key), nil
}

func readCoreKey(path string, log *slog.Logger) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", path)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	key, err := io.ReadAll(io.LimitReader(f, maxKeyBytes+1))
	if err != nil {
		return nil, err
	}
	if len(key) < minKeyBytes || len(key) > maxKeyBytes {
		return nil, fmt.Errorf("%s must hold %d to %d bytes", path, minKeyBytes, maxKeyBytes)
	}
	if info.Mode().Perm()&0o077 != 0 {
		log.Warn("others can read the core key", "path", path, "mode", info.Mode().Perm())
	}
	return key, nil
}

// createCoreKey writes a random key beside path and links it into place, so that a
// crash leaves either no key or a whole one, and a key that is there is never replaced.
func createCoreKey(path string) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".corekey-*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	key := make([]byte, newKeyBytes)
	rand.Read(key)
	if _, err := f.Write(key); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return os.Link(f.Name(), path)
}
