package main

import (
	"io"
	"net/http"
)

// serviceStats answers GET /service/{id}/stats.
func (s *server) serviceStats(w http.ResponseWriter, r *http.Request) error {
	current, _, err := s.lookup(r.Context(), r.PathValue("id"))
	if err != nil {
		return err
	}
	answer, err := s.engine.api().ContainerStats(r.Context(), current.ID, false)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	frame, err := io.ReadAll(answer.Body)
	if err != nil {
		return err
	}
	writeBytes(w, http.StatusOK, frame)
	return nil
}
